import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.file.Path;

/** The JDK's own HTTP client as it comes: it offers an upgrade to HTTP/2 with each request. */
public class Ask {
  /** Arguments: URL, model, file of the body, how often. Prints the version, status and body of each answer. */
  public static void main(String[] args) throws Exception {
    var client = HttpClient.newHttpClient();
    var request = HttpRequest.newBuilder(URI.create(args[0]))
        .header("Content-Type", "application/json")
        .header("X-Amzn-SageMaker-Target-Model", args[1])
        .POST(HttpRequest.BodyPublishers.ofFile(Path.of(args[2])))
        .build();
    for (int i = 0; i < Integer.parseInt(args[3]); i++) {
      var answer = client.send(request, HttpResponse.BodyHandlers.ofString());
      System.out.println(answer.version() + " " + answer.statusCode() + " " + answer.body());
    }
  }
}
